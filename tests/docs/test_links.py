"""Links and pictures of the pages lead somewhere, and the site has every page."""

import re
import sys
import types

import docs_pages as docs
import pytest


@pytest.mark.parametrize("page", docs.PAGES, ids=docs.name)
def test_links_and_pictures_resolve(page):
    broken = []
    for line, target in docs.links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in docs.anchors(file)):
            broken.append(f"{docs.name(page)}:{line}: {target}")
    assert not broken


def test_the_menu_has_every_page():
    menu = re.findall(r"(\S+\.md)$", (docs.ROOT / "mkdocs.yml").read_text(), re.M)
    assert set(menu) == {page.relative_to(docs.DOCS).as_posix() for page in docs.DOCS.rglob("*.md")}


def test_every_picture_is_shown_somewhere():
    shown = {target for page in docs.PAGES for _, target in docs.links(page)}
    assert {f"images/{file.name}" for file in (docs.DOCS / "images").iterdir()} <= shown


def test_files_of_the_root_are_pages_of_the_site(monkeypatch):
    """The page of the repository says where the file is; that of the site is the file, with links as from docs."""
    monkeypatch.syspath_prepend(str(docs.DOCS))
    import site_hooks

    del sys.modules["site_hooks"]
    for page, root in site_hooks.OF_ROOT.items():
        stub = (docs.DOCS / page).read_text()
        assert f"(../{root})" in stub
        of_page = lambda name: types.SimpleNamespace(file=types.SimpleNamespace(src_uri=name))
        assert site_hooks.on_page_markdown(stub, page=of_page("other.md")) == stub
        text = site_hooks.on_page_markdown(stub, page=of_page(page))
        assert text.startswith((docs.ROOT / root).read_text()[:100])
        targets = [target for target in re.findall(r"\]\(([^()\s]+)\)", text) if ":" not in target]
        assert all((docs.DOCS / target.partition("#")[0]).is_file() for target in targets)


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Weights & Biases, MLflow, trackio", "weights--biases-mlflow-trackio"),
        ("Aggregation (`loss.loss_weights`)", "aggregation-lossloss_weights"),
        (
            "Recipes: accuracy of each on the quickstart's task",
            "recipes-accuracy-of-each-on-the-quickstarts-task",
        ),
        ("[Metrics](metrics.md) *of* a run", "metrics-of-a-run"),
    ],
)
def test_anchors_are_those_of_github(heading, anchor):
    assert docs.slug(heading) == anchor


def test_what_a_page_says_is_read(tmp_path):
    """A page with a broken link, one within code, and one with an anchor."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One *two*\n\n[a](b.md#c) `[no](no.md)` ![p](p.png)\n\n```bash\n# no [x](y)\n```\n[d](https://e)\n"
    )
    assert docs.links(page) == [(3, "b.md#c"), (3, "p.png")]
    assert docs.anchors(page) == {"one-two"}
