"""A report as one HTML page that needs nothing else: styles inside, pictures as data: URIs, no
script, nothing fetched."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #fff; --text: #1c2024; --soft: #60676e; --line: #d8dce0; --card: #f6f7f9;
  --good: #18794e; --bad: #b42318; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #15181b; --text: #e6e8ea; --soft: #9ba3ab; --line: #343a40;
  --card: #1d2125; --good: #5bd699; --bad: #ff8a7a; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; }}
h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
p, li {{ max-width: 46rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }}
caption {{ text-align: left; color: var(--soft); font-size: .9rem; padding-bottom: .25rem; }}
th, td {{ padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: nowrap; }}
th {{ font-weight: 600; }}
img {{ max-width: 100%; height: auto; background: #fff; border-radius: 6px; margin: .5rem 0; }}
.prompt {{ font-weight: 600; margin: 1.6rem 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: .8rem; }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; }}
.card h3 {{ margin: 0 0 .3rem; font-size: .95rem; }}
.said {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0; }}
.soft + .soft {{ margin-top: .7rem; }}
.soft {{ color: var(--soft); font-size: .85rem; }}
.good {{ color: var(--good); }} .bad {{ color: var(--bad); }}
summary {{ cursor: pointer; margin: 1rem 0; }}
code {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def escape(text: object) -> str:
    return html.escape(str(text))


def document(title: str, parts: Sequence[str]) -> str:
    """The page: `title` is text, `parts` are HTML made by the functions below."""
    return TEMPLATE.format(title=escape(title), body="\n".join(parts))


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of text; the first cell of each row is its heading."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(c)}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    ]
    about = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{about}<thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def picture(png: Path, text: str) -> str:
    """A PNG file's content; `text` says what it shows."""
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}">'


def card(title: str, answers: Sequence[tuple[str, str, str, str]]) -> str:
    """One model's answers to a prompt: (label, text, remarks, "good" | "bad" | "")."""
    parts = [f"<h3>{escape(title)}</h3>"]
    for label, text, remarks, colour in answers:
        parts.append(f'<div class="soft">{escape(label)}</div>' if label else "")
        parts.append(
            f'<div class="said">{escape(text)}</div><div class="soft {colour}">{escape(remarks)}</div>'
        )
    return f'<div class="card">{"".join(parts)}</div>'


def beside(prompt: str, cards: Sequence[str]) -> str:
    return f'<div class="prompt">{escape(prompt)}</div><div class="cards">{"".join(cards)}</div>'


def details(summary: str, parts: Sequence[str]) -> str:
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"
