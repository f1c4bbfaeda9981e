"""Draws docs/architecture.svg: the rooms of the package, each on the floor that it may look down from.

python docs/architecture.py
"""

from pathlib import Path

# From the ground up. A room imports from the floors below it, and from what stands to its left on its own.
FLOORS = [
    ("the ground", "checks errors tensors networks masks counter entries files report info levels pictures"),
    ("forward processes, grids", "sde chain schedules processes strides grid"),
    ("what is known of x_0", "views codecs denoiser wrappers continuity noise masked activations"),
    ("the table and its loop", "tableau brownian exact diagnose categorical"),
    ("networks and their data", "nn data metrics training"),
    ("solvers, a file a family", "solvers"),
    ("runs, exact laws, log p", "run analysis likelihood"),
    ("samples and edits", "sampling cascade forecasting compiled variance guidance editing tuning"),
    ("judges of samplers", "textbook auditing"),
    ("networks of elsewhere", "interop"),
    ("the command line", "cli"),
]

PAD, ROW, LABEL, CHAR = 12, 44, 210, 8.5


def draw() -> str:
    """The picture, as SVG."""
    width, height = (
        LABEL + max(sum(CHAR * len(room) + 2 * PAD + 8 for room in rooms.split()) for _, rooms in FLOORS) + 70,
        ROW * len(FLOORS) + 2 * PAD,
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="14">',
        "<title>The rooms of scoresde: each imports only what stands below it, or to its left</title>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>',
    ]
    for floor, (label, rooms) in enumerate(reversed(FLOORS)):
        y = PAD + ROW * floor
        out.append(f'<rect x="{PAD}" y="{y}" width="{width - 2 * PAD - 40}" height="{ROW - 4}" fill="#eef1f7"/>')
        out.append(f'<text x="{2 * PAD}" y="{y + 25}" font-family="sans-serif" fill="#555">{label}</text>')
        x = LABEL
        for room in rooms.split():
            box = CHAR * len(room) + 2 * PAD
            out.append(f'<rect x="{x}" y="{y + 6}" width="{box}" height="28" rx="4" fill="#fff" stroke="#3b5b92"/>')
            out.append(f'<text x="{x + PAD}" y="{y + 25}" font-family="monospace" fill="#1c2b4a">{room}</text>')
            x += box + 8
    x, end = width - PAD - 16, height - PAD - 6
    out += [
        f'<path d="M{x} {PAD}V{end}m-5 -9l5 9l5 -9" fill="none" stroke="#3b5b92" stroke-width="1.5"/>',
        f'<text transform="translate({x - 6} {height / 2}) rotate(-90)" text-anchor="middle" font-family="sans-serif" '
        'fill="#555">imports</text>',
    ]
    return "\n".join([*out, "</svg>\n"])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
