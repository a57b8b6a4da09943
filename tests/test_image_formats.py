"""Decoding: published images as Pillow converts them, yours upright as a viewer shows them; others rejected by name."""

import io

import numpy as np
import pytest
from PIL import Image
from support.fabricate import picture

from datasets.task import DatasetError, read_image, read_upright_image

SIZE = (6, 4)


def colours(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def read(path) -> np.ndarray:
    image = read_upright_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


MODES = {
    "png": ("L", "1", "P", "RGB", "LA", "RGBA"),
    "tif": ("L", "1", "P", "RGB", "LA", "RGBA", "CMYK"),
    "gif": ("L", "1", "P", "RGB"),
    "bmp": ("L", "1", "P", "RGB", "RGBA"),
    "webp": ("L", "RGB", "RGBA"),
}


@pytest.mark.parametrize("ending", MODES)
def test_opaque_images_are_read_as_pillow_converts_them(ending, tmp_path):
    options = {"lossless": True} if ending == "webp" else {}
    for mode in MODES[ending]:
        path = saved(tmp_path / f"x.{ending}", picture(1, 1, SIZE).convert(mode), **options)
        assert np.array_equal(read(path), colours(Image.open(path))), mode
        assert np.array_equal(np.asarray(read_image(path)), colours(Image.open(path))), mode
    deep = saved(tmp_path / "deep.png", Image.new("I;16", SIZE, 1))
    assert np.array_equal(np.asarray(read_image(deep)), colours(Image.open(deep)))
    picture(1, 1).save(tmp_path / "x.jpg", "PNG")  # some SUN397 files are called .jpg and are something else
    assert read_image(tmp_path / "x.jpg").size == (40, 32)


def test_cmyk_jpeg(tmp_path):
    path = saved(tmp_path / "x.jpg", Image.new("CMYK", SIZE, (255, 0, 0, 0)))
    assert np.abs(read(path) - [0, 255, 255]).max() < 5


def test_transparency_becomes_white(tmp_path):
    half = Image.new("RGBA", SIZE, (200, 0, 0, 128))
    expected = round(200 * 128 / 255 + 255 * 127 / 255), round(255 * 127 / 255), round(255 * 127 / 255)
    assert np.abs(read(saved(tmp_path / "half.png", half)) - expected).max() <= 1
    clear = Image.new("RGBA", SIZE, (0, 0, 0, 0))  # black under full transparency, as drawing programs save it
    assert (read(saved(tmp_path / "clear.png", clear)) == 255).all()
    assert (read(saved(tmp_path / "clear.webp", clear, lossless=True)) == 255).all()
    assert (read(saved(tmp_path / "la.png", Image.new("LA", SIZE, (0, 0)))) == 255).all()
    palette = Image.new("P", SIZE, 1)
    palette.putpalette([10, 20, 30, 0, 0, 0])
    assert (read(saved(tmp_path / "opaque.png", palette)) == 0).all()
    assert (read(saved(tmp_path / "p.png", palette, transparency=1)) == 255).all()
    assert (read(saved(tmp_path / "p.gif", palette, transparency=1)) == 255).all()
    assert (read(saved(tmp_path / "alphas.png", palette, transparency=bytes([255, 0]))) == 255).all()
    assert (read(saved(tmp_path / "key.png", Image.new("RGB", SIZE), transparency=(0, 0, 0))) == 255).all()
    assert (read(saved(tmp_path / "bit.png", Image.new("1", SIZE), transparency=0)) == 255).all()


TURNS = {  # EXIF's orientation -> the pixels that a camera in this position writes for the upright ones
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_images_are_turned_upright(ending, tmp_path):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 250  # one light corner
    for orientation in (*TURNS, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = Image.fromarray(np.ascontiguousarray(TURNS.get(orientation, TURNS[1])(upright)))
        pixels = read(saved(tmp_path / f"x.{ending}", turned, exif=exif))
        assert pixels.shape == (16, 32, 3) and np.abs(pixels - upright).mean() < 5, orientation


def test_odd_exif_data_do_not_stop_a_good_image(tmp_path):
    """A camera wrote text instead of a number in a field that is not needed."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    path = saved(tmp_path / "x.jpg", picture(1, 1, (32, 16)), exif=exif)
    content = bytearray(path.read_bytes())
    entry = content.index(b"\x01\x1a\x00\x05") if b"\x01\x1a\x00\x05" in content else content.index(b"\x1a\x01\x05\x00")
    content[entry + 2 : entry + 4] = b"\x00\x02" if content[entry] == 1 else b"\x02\x00"  # from rational to text
    path.write_bytes(content)
    assert read(path).shape == (32, 16, 3)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 255, 256, 4095], [32768, 40000, 65279, 65535]], np.uint16)
    expected = np.repeat((levels // 256)[..., None], 3, axis=2)
    image = Image.fromarray(levels)
    for ending in ("png", "tif"):
        assert np.array_equal(read(saved(tmp_path / f"x.{ending}", image)), expected)
    (tmp_path / "big.tif").write_bytes(
        saved(tmp_path / "b.tif", Image.frombytes("I;16B", (4, 2), levels.astype(">u2").tobytes())).read_bytes()
    )
    assert np.array_equal(read(tmp_path / "big.tif"), expected)
    (tmp_path / "x.pgm").write_bytes(b"P5 4 2 65535\n" + levels.astype(">u2").tobytes())
    assert np.array_equal(read(tmp_path / "x.pgm"), expected)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_thirty_two_bits_are_rejected(kind, tmp_path):
    path = saved(tmp_path / "x.tif", Image.fromarray(np.full((4, 6), 7, kind)))
    with pytest.raises(DatasetError, match=r"x.tif .*32 bits"):
        read(path)


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_the_first_of_several_images_is_used(ending, tmp_path):
    first, second = Image.new("RGB", SIZE, (255, 0, 0)), Image.new("RGB", SIZE, (0, 0, 255))
    options = {"lossless": True} if ending == "webp" else {}
    path = saved(tmp_path / f"x.{ending}", first, save_all=True, append_images=[second], **options)
    assert Image.open(path).n_frames == 2
    assert (read(path) == [255, 0, 0]).all()


def test_mpo_of_a_stereo_camera(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (16, 16), (255, 0, 0)).save(
        path, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), (0, 0, 255))]
    )
    assert Image.open(path).format == "MPO"
    assert np.abs(read(path) - [254, 0, 0]).max() < 5


def encoded(image_format: str) -> bytes:
    buffer = io.BytesIO()
    picture(1, 1, (64, 64)).save(buffer, image_format)
    return buffer.getvalue()


PNG = encoded("PNG")
DAMAGED = {
    "zero bytes": (b"", "empty or not an image"),
    "text": (b"hello\n", "empty or not an image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "empty or not an image"),
    "truncated JPEG": (encoded("JPEG")[:-200], "truncated"),
    "JPEG header": (encoded("JPEG")[:30], ""),
    "truncated PNG": (PNG[:-200], "cannot be decoded"),
    "damaged PNG": (PNG[:60] + b"\0" * 40 + PNG[100:], ""),
    "truncated TIFF": (encoded("TIFF")[:-200], "cannot be decoded"),
    "truncated GIF": (encoded("GIF")[:-800], "cannot be decoded"),
    "folder": (None, "is a directory"),
    "broken link": ("nowhere.jpg", "does not exist"),
}


@pytest.mark.parametrize(("content", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_rejected_by_name(content, words, tmp_path):
    path = tmp_path / "x.jpg"
    if content is None:
        path.mkdir()
    elif isinstance(content, str):
        path.symlink_to(content)
    else:
        path.write_bytes(content)
    for reader in (read_image, read_upright_image):
        with pytest.raises(DatasetError) as caught:
            reader(path)
        message = str(caught.value)
        assert str(path) in message and words in message.lower() and "\n" not in message
        assert ("download" in message or "unpack" in message) == (reader is read_image), "your images have no archive"
