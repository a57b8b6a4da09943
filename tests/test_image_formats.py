"""Decoding: published images as Pillow converts them, yours upright as a viewer shows them; others rejected by name."""

import io
import random
import struct
import warnings
import zlib
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
from PIL import Image
from support.fabricate import picture

from benchmarks.fuzz_images import damaged
from datasets.acquire import doctor
from datasets.decoding import Reading, image_endings, read_image, read_upright_image
from datasets.task import DatasetError

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


def tiff_of_channels(number: int) -> bytes:
    """Return a TIFF of one pixel with many channels, as cameras on satellites write it."""
    tags = {
        256: (4, 1),
        257: (4, 1),
        258: (3, 8),
        259: (3, 1),
        262: (3, 1),
        273: (4, 8),
        277: (3, number),
        279: (4, number),
    }
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in tags.items())
    pixel = bytes(number).ljust(24, b"\0")
    return b"II*\0" + struct.pack("<I", 8 + len(pixel)) + pixel + struct.pack("<H", len(tags)) + entries + bytes(4)


# A header with the extension of DirectX 10 and its format 93, which Pillow does not implement.
DDS = b"DDS " + struct.pack("<7I44x8I5I", 124, 0x1007, 4, 4, 16, 0, 0, 32, 4, 0x30315844, *[0] * 5, 0x1000, *[0] * 4)
DDS += struct.pack("<5I", 93, 3, 0, 1, 0) + bytes(64)

PNG = encoded("PNG")
DAMAGED = {
    "no bytes": (b"", "empty"),
    "zero bytes": (b"\0" * 9000, "zero bytes"),
    "text": (b"hello\n", "a text file"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg drawing"),
    "SVG behind a declaration": (b"<?xml version='1.0'?>\n<svg viewBox='0 0 1 1'/>", "svg drawing"),
    "web page": (b"\n<!DOCTYPE html><html lang='fr'>\xe9t\xe9</html>", "a web page"),
    "server's answer": (b'{"error": "quota"}', "a text file"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git lfs pull"),
    "PDF": (b"%PDF-1.7\n", "a pdf document"),
    "video": (b"\0\0\0\x20ftypisom\0\0\2\0", "a video"),
    "other video": (b"RIFF\0\0\0\0AVI LIST", "a video"),
    "HEIC that is damaged": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic"),
    "archive": (b"PK\3\4" + b"\0" * 30, "zip archive"),
    "JPEG XL": (b"\xff\x0a\xfa\x1f", "jpeg xl"),
    "TIFF of 13 channels": (tiff_of_channels(13), "tiff"),
    "DDS of an unknown kind": (DDS, "93"),
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
        assert ("unpack" in message) == (reader is read_image), "your images have no archive"


def png_of_16_bits(levels: np.ndarray) -> bytes:
    """Return a PNG with 16 bits in each of three channels; `levels` [height, width, 3]."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "colour.png"])
def test_twelve_bits_in_sixteen_are_not_read_as_nearly_black(ending, tmp_path):
    levels, path = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8), tmp_path / f"x.{ending}"
    if ending == "colour.png":
        path.write_bytes(png_of_16_bits(np.repeat(levels[..., None], 3, axis=2)))
    elif ending == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(path)
    with pytest.raises(DatasetError, match=r"--white_level 65535|65535 for an image that is dark"):
        read_upright_image(path)
    assert np.array_equal(np.asarray(read_upright_image(path, Reading(white_level=65535)))[..., 0], levels // 256)
    if ending == "colour.png":  # Pillow keeps only the upper 8 of the 16 bits
        with pytest.raises(DatasetError, match="8 bits"):
            read_upright_image(path, Reading(white_level=4095))
    else:
        assert np.array_equal(np.asarray(read_upright_image(path, Reading(white_level=4095)))[..., 1], levels // 16)
        with pytest.raises(DatasetError, match="--white_level 1000"):
            read_upright_image(path, Reading(white_level=1000))


def test_with_its_white_level_an_image_of_32_bits_is_read(tmp_path):
    path = saved(tmp_path / "x.tif", Image.fromarray(np.array([[0, 0.25], [0.5, 1]], np.float32)))
    assert np.asarray(read_upright_image(path, Reading(white_level=1)))[..., 0].tolist() == [[0, 64], [128, 255]]
    saved(path, Image.fromarray(np.array([[0, np.nan]], np.float32)))
    with pytest.raises(DatasetError, match=r"x\.tif"):
        read_upright_image(path, Reading(white_level=1))


def test_large_images_have_a_limit_of_our_own(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.png", Image.new("1", (1500, 1000)))
    for limit in (1000, 10**6):  # Pillow's: an error at twice the limit, a warning above it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_upright_image(path).size == read_image(path).size == (1500, 1000)
        assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(DatasetError, match=r"x\.png .*--max_megapixels"):
        read_upright_image(path, Reading(max_megapixels=1))


@pytest.mark.parametrize("ending", ["icns", "ico"])
def test_an_icon_is_as_large_as_the_image_in_it(ending, tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (1500, 1000)).save(png, "PNG")
    inside = png.getvalue()
    chunk = b"ic07" + struct.pack(">I", 8 + len(inside)) + inside  # says 128 x 128
    icns = b"icns" + struct.pack(">I", 8 + len(chunk)) + chunk
    ico = struct.pack("<HHH BBBB HHII", 0, 1, 1, 48, 48, 0, 0, 1, 1, len(inside), 22) + inside  # says 48 x 48
    (tmp_path / f"x.{ending}").write_bytes({"icns": icns, "ico": ico}[ending])
    with pytest.raises(DatasetError, match=rf"x\.{ending} .*--max_megapixels"):
        read_upright_image(tmp_path / f"x.{ending}", Reading(max_megapixels=1))
    if ending == "ico":  # Pillow rejects the other for its size
        assert read_upright_image(tmp_path / "x.ico", Reading(max_megapixels=2)).size == (1500, 1000)


def test_pillows_warnings_are_silent_while_several_threads_read(tmp_path, capfd):
    """Their filters are those of the whole process; the last thread restores them."""
    odd = saved(tmp_path / "x.png", Image.new("P", SIZE), transparency=bytes([255, 0]))
    filters = list(warnings.filters)
    with ThreadPool(4) as pool:
        pool.map(read_image, [odd] * 40)
    assert warnings.filters == filters
    (tmp_path / "y.tif").write_bytes(tiff_of_channels(13))
    with pytest.raises(DatasetError):
        read_image(tmp_path / "y.tif")
    assert capfd.readouterr() == ("", "")


def test_only_what_can_be_decoded_counts_as_an_image():
    assert {".mpo", ".jpg", ".jfif", ".png", ".apng", ".tiff", ".webp", ".bmp", ".jp2", ".heic"} <= set(image_endings())
    data = {".h5", ".hdf", ".mpg", ".mpeg", ".fits", ".wmf", ".emf", ".grib", ".bufr", ".eps", ".ps", ".pdf", ".palm"}
    assert not data & set(image_endings())


def test_heic_is_read_or_named(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(picture(1, 1, (64, 48))).save(tmp_path / "x.jpg", quality=95)  # phones' programs rename it
    assert read(tmp_path / "x.jpg").shape == (48, 64, 3)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    with pytest.raises(DatasetError, match=r"x\.jpg .*pip install pillow-heif"):
        read(tmp_path / "x.jpg")


@pytest.mark.parametrize("image_format", ["AVIF", "JPEG2000", "DDS", "ICNS", "ICO", "SGI", "TGA", "PCX", "QOI", "TIFF"])
def test_whatever_a_decoder_raises_is_one_line_with_the_files_name(image_format, tmp_path):
    whole, path, rejected = encoded(image_format), tmp_path / "x.jpg", 0
    for seed in range(40):
        path.write_bytes(damaged(whole, random.Random(seed)))
        try:
            read_upright_image(path)
        except DatasetError as error:
            rejected += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert rejected


@pytest.mark.parametrize(
    "image, flags, code",
    [
        (Image.new("L", (1200, 1000)), (), 0),
        (Image.new("L", (1200, 1000)), ("--max_megapixels", 1), 2),
        (Image.fromarray(np.arange(0, 4096, 64, np.uint16).reshape(8, 8)), (), 2),
        (Image.fromarray(np.arange(0, 4096, 64, np.uint16).reshape(8, 8)), ("--white_level", 4095), 0),
    ],
)
def test_a_run_and_the_doctor_reject_the_same_images(run_main, tmp_path, capsys, image, flags, code):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(4):
            image.save(tmp_path / "pets" / name / f"{number}.png")
    own = ("--root_path", tmp_path / "pets", *flags)
    found, _, _, err = run_main("--dataset", "folder", "--backbone", "tiny", "--method", "zero_shot", *own)
    assert found == doctor.main(["folder", *map(str, own)]) == code
    if code:
        assert f"{tmp_path / 'pets'}/cat/" in err.splitlines()[-1] and "cat/0.png" in capsys.readouterr().out
