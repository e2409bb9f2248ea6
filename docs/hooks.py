"""What MkDocs is told beside mkdocs.yml: pages made from the code and from files elsewhere, and links between them all.

In the repository the pages link to each other as files, so that they read there too. Here those links are turned to the
site's pages; one that leads to a file of the code becomes its plain text, one that leads nowhere ends the build.
"""

import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import nspo
from nspo.cli.config_files import commented_yaml
from nspo.cli.main import parser_for
from nspo.cli.stages import GROUPS
from nspo.settings.config import Config

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"README.md": "index.md", "config/README.md": "configuration.md", "performance/README.md": "performance.md"}
LINK = re.compile(r'(?P<open>\[(?P<text>[^\]]*)\]\(|src=")(?P<target>[^)\s"#]+)(?P<anchor>#[^)\s"]*)?(?P<close>[)"])')
LOG = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    os.environ["COLUMNS"] = "100"  # of the help texts
    for page, text in (("cli.md", _commands()), ("settings.md", _settings()), ("api.md", _names())):
        files.append(File.generated(config, f"reference/{page}", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository to links between pages."""
    found = {page: source for source, page in ELSEWHERE.items()}
    place = found.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def turn(link: re.Match[str]) -> str:
        if "://" in link["target"]:
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link["target"]))
        target = target + "/README.md" if (ROOT / target / "README.md").is_file() else target
        to = ELSEWHERE.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        if to:
            to = posixpath.relpath(to, posixpath.dirname(page.file.src_uri) or ".")
            return f"{link['open']}{to}{link['anchor'] or ''}{link['close']}"
        if not (ROOT / target).exists() and not place.startswith("docs/reference/"):
            LOG.warning("%s: the link %s leads nowhere", place, link["target"])
        return link["text"] or ""

    return LINK.sub(turn, markdown)


def _commands() -> str:
    lines = ["# Commands", "", "Every flag of a setting is spelt like its key in the configuration."]
    for title, names in GROUPS.items():
        lines += ["", f"## {title}"]
        for name in names:
            text = parser_for(name.split())[0].format_help()
            lines += ["", f"### nspo {name}", "", "```text", text.rstrip(), "```"]
    return "\n".join(lines)


def _settings() -> str:
    lines = ["# Settings", "", "Every key with its default; one that is left out keeps it."]
    for section in commented_yaml(Config()).strip("\n").split("\n\n"):
        name = next(line for line in section.splitlines() if not line.startswith("#")).partition(":")[0]
        lines += ["", f"## {name}", "", "```yaml", section, "```"]
    return "\n".join(lines)


def _names() -> str:
    lines = ["# Names", "", "What `from nspo import ...` offers."]
    for name in nspo.__all__:
        lines += ["", f"::: {nspo._PLACES[name].replace(':', '.')}", "    options: {heading_level: 2}"]
    lines += ["", "::: nspo.plot", "    options: {heading_level: 2, show_root_full_path: true}"]
    return "\n".join(lines)
