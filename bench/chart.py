"""Draw a bar chart as SVG, readable on light and dark pages."""

from html import escape
from pathlib import Path

HEIGHT, LEFT, WIDTH = 26, 300, 420

STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; }
.ours { font-weight: 600; }
rect { fill: #8c959f; }
rect.ours { fill: #1a7f37; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  rect { fill: #6e7681; }
  rect.ours { fill: #3fb950; }
}
"""


def draw(
    file: Path, title: str, bars: dict[str, float], ours: str, number: str = "{:.2f}"
) -> None:
    """Write `bars`, by name, as a picture. Highlight names that contain `ours`.

    `number` is the format of their values.
    """
    longest = max(bars.values())
    height = HEIGHT * (len(bars) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 90}'
        f' {height}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text x="8" y="20" class="ours">{escape(title)}</text>',
    ]
    for row, (name, value) in enumerate(bars.items(), 1):
        y = HEIGHT * row + 12
        kind = ' class="ours"' if ours in name else ""
        length = WIDTH * value / longest
        lines += [
            f'<text x="8" y="{y + 15}"{kind}>{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.0f}" height="20"{kind}/>',
            f'<text x="{LEFT + length + 8:.0f}" y="{y + 15}"{kind}>'
            f"{number.format(value)}</text>",
        ]
    file.write_text("\n".join([*lines, "</svg>\n"]))
