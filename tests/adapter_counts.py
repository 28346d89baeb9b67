"""Published counts of adapters and fusions, recounted: shapes are put on a GPT of the paper's depth
and width on the meta device and what asks for a gradient is counted. No formula is evaluated.
"""

from functools import partial

import torch

import minipeft
from minipeft import GPT, Adapter, AdapterFusion, GPTConfig

Lin = partial(Adapter, placement="pfeiffer", own_norm=True)  # Adapter_L in LoRA's tables
Houlsby = partial(Adapter, layer_norms=False)  # the published counts leave the LayerNorms out
Pfeiffer = partial(Adapter, placement="pfeiffer")
Parallel = partial(Adapter, placement="parallel", scale=4.0)

RECOUNT = {  # id in published_counts.json -> (layers, width, technique)
    "adapterL-medium-r6": (24, 1024, Lin(bottleneck=6)),
    "adapterL-medium-r224": (24, 1024, Lin(bottleneck=224)),
    "adapterL-large-r8": (36, 1280, Lin(bottleneck=8)),
    "adapterL-large-r248": (36, 1280, Lin(bottleneck=248)),
    "adapterH-gpt2m": (24, 1024, Houlsby(bottleneck=112)),
    "adapterH-gpt3-r4": (96, 12288, Houlsby(bottleneck=4)),
    "adapterH-gpt3-r8": (96, 12288, Houlsby(bottleneck=8)),
    "adapterH-gpt3-r16": (96, 12288, Houlsby(bottleneck=16)),
    "adapterH-gpt3-r64": (96, 12288, Houlsby(bottleneck=64)),
    "houlsby-bertlarge-64": (24, 1024, Houlsby(bottleneck=64)),
    "houlsby-bertbase-64": (12, 768, Houlsby(bottleneck=64)),
    "pfeiffer-bert-base-rf16": (12, 768, Pfeiffer(bottleneck=768 // 16)),
    "pfeiffer-bert-large-rf64": (24, 1024, Pfeiffer(bottleneck=1024 // 64)),
    "lib-seqbn-bert-large": (24, 1024, Pfeiffer(bottleneck=1024 // 16, variant="adapters")),
    "lib-doubleseqbn-bert-base": (12, 768, Adapter(bottleneck=768 // 16, variant="adapters")),
    "lib-parbn-bert-base": (12, 768, Parallel(bottleneck=768 // 2)),
    "lib-parbn-bert-large": (24, 1024, Parallel(bottleneck=1024 // 2)),
    "fusion-bert-base": (12, 768, AdapterFusion(adapters=[Pfeiffer(bottleneck=48)] * 2)),
    "adalora-padapter-r32": (12, 768, Pfeiffer(bottleneck=32)),
    "adalora-padapter-r16": (12, 768, Pfeiffer(bottleneck=16)),
    "adalora-hadapter-r16": (12, 768, Houlsby(bottleneck=16)),
    "adalora-hadapter-r8": (12, 768, Houlsby(bottleneck=8)),
    "unipelt-adapter": (12, 768, Pfeiffer(bottleneck=768 // 16)),
    "tfew-adapter": (48, 2048, Pfeiffer(bottleneck=2048 // 32)),
}
# T-Few trains T5's norms too, a gain each: 2 in an encoder block, 3 in a decoder block, 2 more.
NORMS_BESIDE = {"tfew-adapter": (24 * 2 + 24 * 3 + 2, 2048)}


def recount(id):
    """The number of trained parameters for a row of published_counts.json."""
    layers, width, technique = RECOUNT[id]
    config = GPTConfig(vocab_size=8, context_length=8, n_layer=layers, n_head=4, d_model=width)
    with torch.device("meta"):
        model = GPT(config)
        technique.attach(model)
        norms, size = NORMS_BESIDE.get(id, (0, 1))
        gains = [torch.nn.RMSNorm(size) for _ in range(norms)]
    assert minipeft.report(model).trained == technique.count(config)
    return minipeft.report(model).trained + sum(g.weight.numel() for g in gains)
