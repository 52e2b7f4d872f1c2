"""The reference as the paper feeds it to the VAE: letterboxed to the video's size (Sec. 3.1)."""

from PIL import Image


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """The whole image at the largest scale that fits height x width, centred, with black bars (Sec. 3.1).

    The paper scales by the largest factor that keeps the aspect ratio and pads the shorter side symmetrically; the
    padding's color is left open, and black is the decision here.
    """
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    resized = image.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas
