"""The chapters as a site: no network, no script, every formula drawn."""

from __future__ import annotations

import importlib.util
import re
from html.parser import HTMLParser

import nbformat
import pytest

from tests.chapters.running import CHAPTERS, SCRIPTS


@pytest.fixture(scope="module")
def book():
    spec = importlib.util.spec_from_file_location("book", CHAPTERS / "book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(book, tmp_path_factory):
    return book.make_book(tmp_path_factory.mktemp("site") / "book").parent


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside of <pre>."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.prose, self.inside = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("pre", "code", "math"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, text):
        if not self.inside:
            self.prose.append(text)


def pages(site):
    return {path.stem: Reader(path.read_text(encoding="utf-8")) for path in site.glob("*.html")}


def test_there_is_a_page_for_every_chapter_and_a_first_page(site):
    assert set(pages(site)) == {p.stem for p in SCRIPTS} | {"index"}
    assert (site / "index.html").read_bytes() == (site / f"{SCRIPTS[0].stem}.html").read_bytes()


def test_nothing_comes_from_elsewhere_and_nothing_runs(site):
    for name, page in pages(site).items():
        assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object")], name
        for tag, attributes in page.tags:
            for key in ("src", "href"):
                value = attributes.get(key, "")
                local = value.startswith(("data:image/png;base64,", "#")) or (site / value).exists()
                paper = tag == "a" and value.startswith("https://arxiv.org/")  # only if clicked
                assert not value or local or paper, f"{name}: <{tag} {key}={value[:80]}>"
    assert "url(" not in (site / "book.css").read_text()


def test_every_formula_is_drawn(site):
    for name, page in pages(site).items():
        text = "".join(page.prose)
        assert "$" not in text and "\\" not in text, f"{name}: {re.findall(r'.*[$].*', text)[:3]}"
    formulas = [tag for tag, _ in pages(site)["09_lora"].tags if tag == "math"]
    assert len(formulas) > 15


def test_pictures_keep_their_words(site):
    for name, page in pages(site).items():
        for tag, attributes in page.tags:
            assert tag != "img" or len(attributes["alt"]) > 20, name


def test_a_formula_in_code_is_left_alone(book):
    kept = "costs `$5` and\n```\n$x$\n```\n"
    assert book.with_mathml(kept) == kept
    assert book.with_mathml("from $5 to 10 dollars") == "from $5 to 10 dollars"


def test_a_minus_that_has_nothing_on_its_left_is_a_sign(book):
    sign, minus = '<mo form="prefix">&#x02212;</mo>', "<mo>&#x02212;</mo>"
    for formula in (r"a = -b", r"(-b)", r"a, -b"):
        assert sign in book.mathml(formula, block=False), formula
    for formula in (
        r"a - b",
        r"(a) - b",
        r"\{a\} - b",
        r"|a| - b",
        r"x^\top - b",
        r"\big(a\big) - b",
    ):
        written = book.mathml(formula, block=False)
        assert minus in written and sign not in written, formula
    assert "<mi>&#x0221E;</mi>" in book.mathml(r"-\infty", block=False)


def test_a_prime_is_not_raised_twice_and_a_norm_has_two_bars_of_one_size(book):
    assert "msup" not in book.mathml("W'x", block=False)
    bars = re.findall(r"<mo[^>]*>&#x02016;", book.mathml(r"\lVert X \rVert_F^2", block=False))
    assert len(bars) == 2 and all('stretchy="false"' in bar for bar in bars)


def test_a_word_in_a_formula_is_no_space(book):
    written = book.mathml(r"\text{gain} - \text{base} \quad \text{(GPT 1)}", block=True)
    assert "<mi>gain</mi>" in written and "<mi>base</mi>" in written
    assert "<mtext>(GPT" in written, "several words stay text"


def test_a_logarithm_stands_apart_from_its_neighbours_but_not_from_a_bracket(book):
    spaces = {r"p \ln p": 2, r"\log_2 n": 1, r"-\ln\tfrac12": 1, r"\ln(p)": 0, r"\ln\big(p\big)": 0}
    for formula, expected in spaces.items():
        assert book.mathml(formula, block=False).count("<mspace") == expected, formula


def test_an_equation_s_id_is_not_broken_at_the_end_of_a_line(book):
    said = book.prose("by (Hard\nprompt 1) and (LoRA 3); `(LoRA 3)`, (in 2021)")
    assert "(Hard\xa0prompt\xa01) and (LoRA\xa03)" in said
    assert "<code>(LoRA 3)</code>, (in 2021)" in said


def test_an_unknown_command_is_named(book):
    with pytest.raises(ValueError, match=r"nosuchthing b' is unknown; add it to PLAIN"):
        book.mathml(r"a \nosuchthing b", block=False)


def test_links_lead_to_pages_of_the_site(book):
    assert 'href="09_lora.html"' in book.prose("see [LoRA](09_lora.ipynb)")
    assert book.prose("see [the file](../minipeft/gpt.py)").strip() == "<p>see the file</p>"


def test_an_output_of_an_unknown_kind_is_refused(book):
    output = nbformat.v4.new_output("display_data", data={"application/x": "?"})
    with pytest.raises(ValueError, match=r"an output of \['application/x'\] has no place"):
        book.shown(output)


def test_text_in_outputs_is_no_html(book):
    output = nbformat.v4.new_output("stream", text="<b> & x")
    assert book.shown(output) == "<pre>&lt;b&gt; &amp; x</pre>"
