r"""Tiny Town: a small world whose every random choice is known, so the best possible loss is known
exactly.

    grammar     documents as programs of two callbacks: sample them, or sum over all derivations
    world       who and what there is
    documents   what people write: kinds of document, two styles of story, the pre-training mix
    tasks       seven tasks with their floors, and home
    teacher     the exact distribution of every next token
    base        the pre-trained base: recipe and measurements
    build       the folder data/
"""

from minipeft.town.base import held_out, measure, mix_floor, pretraining_documents
from minipeft.town.build import base_folder, build_data, data_folder, load_base
from minipeft.town.documents import DIALECT, HOME
from minipeft.town.grammar import enumerate_documents, log_prob, nats, next_words, sample
from minipeft.town.tasks import (
    TASKS,
    WORLD,
    Task,
    describe,
    home_documents,
    home_floor,
    mix,
    mood_posterior,
)
from minipeft.town.teacher import soft_labels
from minipeft.town.world import build_world, tiny_world

__all__ = [
    "DIALECT",
    "HOME",
    "TASKS",
    "WORLD",
    "Task",
    "base_folder",
    "build_data",
    "build_world",
    "data_folder",
    "describe",
    "enumerate_documents",
    "held_out",
    "home_documents",
    "home_floor",
    "load_base",
    "log_prob",
    "measure",
    "mix",
    "mix_floor",
    "mood_posterior",
    "nats",
    "next_words",
    "pretraining_documents",
    "sample",
    "soft_labels",
    "tiny_world",
]
