"""The docs site: its navigation lists every page, its links stay inside docs/, and it builds without a warning."""

import html
import re
import shutil
import subprocess

import pytest
import yaml

import minitrain
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags for Python objects only mkdocs needs."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def nav_pages(nav: list | str) -> list[str]:
    """Return the files of a navigation with sections."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in nav for below in entry.values() for page in nav_pages(below)]


def test_the_navigation_lists_every_page_once():
    assert sorted(nav_pages(SITE["nav"])) == [page.name for page in PAGES]


def test_links_between_pages_stay_inside_the_site():
    """A link to a file outside docs/ works on GitHub and leads nowhere on the site."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert target in nav_pages(SITE["nav"]) or target.startswith("images/"), f"{page.name} links to {target}"


def test_the_api_page_has_every_public_name():
    """The page names the module that defines a name, so the check of generated pages notices a name that moves."""
    names = re.findall(r"^::: \S+\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert names == list(minitrain.__all__)


@pytest.mark.slow(minutes=1)
@pytest.mark.skipif(not shutil.which("mkdocs"), reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path):
    """Lists, tables and code blocks are rendered, and no id occurs twice on a page."""
    command = ["mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = sorted(tmp_path.rglob("index.html"))
    assert len(built) == len(PAGES)
    for page in built:
        (article,) = re.findall(r"<article.*</article>", page.read_text(), re.S)
        prose = html.unescape(re.sub(r"<(pre|code)\b.*?</\1>", "", article, flags=re.S))
        assert not re.search(r"^(- |\d+\. |:::|\|)|```|\*\*", prose, re.M), page.parent.name
        assert "\\|" not in article, page.parent.name
        ids = re.findall(r' id="([^"]+)"', article)
        assert len(ids) == len(set(ids)), page.parent.name
