"""The report as one HTML file that opens from a disk, without a network: text, tables and pictures in one piece."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable

from markdown_it import MarkdownIt

# The report's own pictures are in the same folder; other pictures that a text names are not read.
IMAGE = re.compile(r'<img src="([\w-]+\.png)"')

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --text: #1b1f24; --soft: #59636e; --line: #d5dae0; --ground: #ffffff; --mark: #f4f6f8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e6e9ed; --soft: #9aa4af; --line: #3a414a; --ground: #15181c; --mark: #1f242a; }}
  img {{ filter: invert(0.9) hue-rotate(180deg); }}
}}
body {{ font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--ground);
       max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }}
h1, h2 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ color: var(--soft); font-weight: 600; }}
blockquote {{ margin: 1rem 0; padding: 0.1rem 1rem; border-left: 4px solid #c77700; background: var(--mark); }}
code, pre {{ font: 0.9em/1.5 ui-monospace, monospace; background: var(--mark); border-radius: 4px; }}
code {{ padding: 0.1em 0.3em; overflow-wrap: anywhere; }}
pre {{ padding: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
li {{ overflow-wrap: anywhere; }}
pre code {{ padding: 0; }}
img {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def html_page(text: str, title: str, read: Callable[[str], bytes]) -> str:
    """A page of a Markdown text.

    Args:
        read: gives the PNG files that the text shows, by name.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = parser.render(text).replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")

    def inline(match: re.Match[str]) -> str:
        data = base64.b64encode(read(match[1])).decode()
        return f'<img src="data:image/png;base64,{data}"'

    return PAGE.format(title=html.escape(title), body=IMAGE.sub(inline, body))
