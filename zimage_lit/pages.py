"""What the HTML pages share: a frame that needs nothing beside it and runs nothing, and pictures inside the page."""

import base64
from html import escape

from PIL import Image

from zimage_lit.grids import encoded

SMALL = 128  # pixels; pictures up to here are enlarged and keep their pixels visible
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#222}
img{max-width:100%}table{border-collapse:collapse}
td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}pre{background:#f6f6f6;padding:1rem;overflow:auto;font-size:13px}
figure{margin:1rem 0}figcaption{color:#666}"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole HTML file; `body` is HTML already, `style` adds to the pages' own. Its policy lets no script run."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style>{body}</html>\n"
    )


def data_uri(content: bytes, form: str) -> str:
    """A file of the format `form`, PNG or WEBP for example, as the address of a picture."""
    return f"data:image/{form.lower()};base64,{base64.b64encode(content).decode()}"


def figure(png: bytes, caption: str) -> str:
    """A PNG with its caption below."""
    text = escape(caption)
    return f"<figure><img alt='{text}' src='{data_uri(png, 'PNG')}'><figcaption>{text}</figcaption></figure>"


def reduced(picture: Image.Image, longest: int, alt: str) -> str:
    """The <img> of a picture of at most `longest` pixels a side; small ones are kept to the pixel (class `small`)."""
    small = max(picture.size) <= SMALL
    picture = picture.convert("RGB")
    picture.thumbnail((longest, longest))
    form = "PNG" if small else "WEBP"
    source = data_uri(encoded(picture, form), form)
    return f'<img class="{"small" if small else "large"}" alt="{escape(alt)}" src="{source}">'
