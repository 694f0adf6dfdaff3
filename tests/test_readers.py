"""Files of every kind, size, name and damage: read rightly or refused by name, never changed in silence."""
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rasa_nb.data import ImageFolder, ImageMaskFolder, as_image, read_image, read_mask, to_rgb

rng = np.random.default_rng(0)
COLORS = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)   # [24, 32, 3]
FORMATS = """PNG TIFF BMP GIF JPEG WEBP PPM TGA JPEG2000 PCX SGI IM MSP XBM ICO DDS SPIDER AVIF QOI DIB
    BLP""".split()
LOSSY = "JPEG", "JPEG2000", "WEBP", "AVIF", "BLP"   # as Pillow writes them unasked
MODES = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16 I;16B I;16L I;16N".split()


def encoded(picture, format, **how):
    "The bytes of a picture in a format, or None where Pillow does not write its mode."
    file = BytesIO()
    how = dict(sizes=[picture.size]) if format == "ICO" else how
    try: picture.save(file, format, **how)
    except (OSError, ValueError, KeyError, SystemError, AttributeError): return None
    return file.getvalue()


def png(values, bits):
    "A gray PNG of so many bits: a writer of its own, as Pillow writes 8 or 16."
    height, width = values.shape
    raw = np.unpackbits(values.astype(">u2" if bits == 16 else np.uint8)[..., None].view(np.uint8), axis=-1)
    rows = np.packbits(raw[..., -bits:].reshape(height, -1), axis=-1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def picture_of(mode):
    "The colors as a picture of a mode, with half of it transparent where the mode can say so."
    picture = Image.fromarray(COLORS)
    gray = np.asarray(picture.convert("L"))
    if mode in ENDS: return Image.frombytes(mode, picture.size, (gray * 257.).astype(ENDS[mode]).tobytes())
    if mode == "I": return Image.fromarray(gray.astype(np.int32) * 257)
    if mode == "F": return Image.fromarray(gray.astype(np.float32) / 255)
    if mode == "LAB": return lab(picture)
    alpha = Image.fromarray(np.repeat([[255, 0]], 16, 1).repeat(24, 0).astype(np.uint8))
    if mode == "PA":
        picture = picture.convert("L").convert("P")
        picture.putalpha(alpha)
        return picture
    if mode in ("RGBA", "RGBa", "LA", "La"):
        picture.putalpha(alpha)
        if mode == "RGBA": return picture
        return picture.convert("RGBa") if mode == "RGBa" else picture.convert("LA").convert(mode)
    return picture.convert(mode)


ENDS = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}


def lab(picture):
    from PIL import ImageCms
    return ImageCms.profileToProfile(
        picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")


def seen(mode):
    "What a picture of that mode shows, by Pillow alone and without the package: [24, 32, 3]."
    picture = picture_of(mode)
    gray = mode[0] in "IF" or mode in ("L", "LA", "La", "PA")
    if gray: shown = Image.fromarray(COLORS).convert("L").convert("RGB")
    elif mode in ("RGBA", "RGBa", "LAB"): shown = Image.fromarray(COLORS)
    else: shown = picture.convert("RGB")
    shown = np.array(shown)
    if mode in ("RGBA", "RGBa", "LA", "La", "PA"): shown[:, 16:] = 255
    return shown


def read_or_refuse(read, path):
    "What is read, or None where the file is refused by its name."
    try: return read(path).numpy()
    except ValueError as error:
        assert str(path) in str(error) and "cannot be read as" in str(error)
        return None


# Images

@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_every_mode_is_what_it_shows(mode, tmp_path):
    picture, expected = picture_of(mode), seen(mode)
    read, loose = 0, 30 if mode == "LAB" else 1
    for format in FORMATS:
        data = encoded(picture, format)
        if data is None: continue
        with Image.open(BytesIO(data)) as back: kept = back.mode.split(";")[0] == mode.split(";")[0]
        path = tmp_path / f"x.{format}"
        path.write_bytes(data)
        found = read_or_refuse(read_image, path)
        shown = found is not None and np.abs(found.transpose(1, 2, 0).astype(int) - expected)
        if found is None: assert format in ("SPIDER", "TIFF", "IM", "PPM"), (format, "refused")
        elif kept and format not in LOSSY: assert shown.mean() < loose / 10 and shown.max() <= loose, format
        elif kept: assert shown.mean() < 20, format
        read += found is not None
    assert read or mode in ("I", "La", "I;16N", "HSV"), "no file of this mode was read"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "I"])
def test_a_picture_in_memory_shows_what_its_file_does(mode):
    for found in (to_rgb(picture_of(mode)), as_image(picture_of(mode)) * 255):
        off = np.abs(found.permute(1, 2, 0).numpy() - seen(mode).astype(float))
        assert off.max() <= (30 if mode == "LAB" else .6) and off.mean() < 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_of_any_depth_goes_from_black_to_white(bits, tmp_path):
    ramp = np.arange(2**min(bits, 8)).repeat(2)[None] * (257 if bits == 16 else 1)
    (tmp_path / "x.png").write_bytes(png(ramp, bits))
    expected = np.linspace(0, 255, 2**min(bits, 8)).repeat(2).round()
    assert np.array_equal(read_image(tmp_path / "x.png")[1, 0], expected)


@pytest.mark.parametrize("picture, said", [
    (Image.fromarray(np.full((4, 5), 70000, np.int32)), "holds int32: expected uint8, uint16"),
    (Image.fromarray(np.full((4, 5), 200, np.float32)), "ranges from 200.00 to 200.00, expected floats in"),
    (Image.fromarray(np.full((4, 5), np.nan, np.float32)), "20 values that are not finite")])
def test_values_that_could_mean_anything_are_refused(picture, said, tmp_path):
    picture.save(tmp_path / "x.tif")
    for read in (read_image, to_rgb, as_image):
        with pytest.raises((ValueError, TypeError), match=said): read(tmp_path / "x.tif")


# Masks

IDS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_every_mode_gives_its_ids_or_is_refused(mode, tmp_path):
    if mode in ("L", "P", "I") or mode.startswith("I;16"):
        picture = Image.fromarray(IDS)
        if mode == "P": picture.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        if mode == "I": picture = Image.fromarray(IDS.astype(np.int32))
        if mode in ENDS: picture = Image.frombytes(mode, (16, 16), IDS.astype(ENDS[mode]).tobytes())
        expected = IDS
    else:
        picture = picture_of(mode)
        expected = np.asarray(picture).astype(np.uint8) if mode == "1" else None
    for format in FORMATS:
        data = encoded(picture, format)
        if data is None: continue
        path = tmp_path / f"x.{format}"
        path.write_bytes(data)
        found = read_or_refuse(read_mask, path)
        if found is None: assert expected is None or format not in ("PNG", "BMP", "TGA"), format
        else: assert np.array_equal(found, expected), format


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ids_of_few_bits_are_not_spread(bits, tmp_path):
    ids = np.arange(2**bits).repeat(2)[None]
    (tmp_path / "x.png").write_bytes(png(ids, bits))
    assert np.array_equal(read_mask(tmp_path / "x.png"), ids)


@pytest.mark.parametrize("data, said", [
    (encoded(Image.fromarray(IDS), "JPEG"), "JPEG does not keep class ids"),
    (encoded(Image.fromarray(IDS), "TIFF", compression="jpeg"), "TIFF does not keep class ids"),
    (encoded(Image.fromarray(IDS), "JPEG2000"), "JPEG2000 does not keep class ids"),
    (encoded(Image.fromarray(IDS), "GIF"), "GIF does not keep class ids"),
    (encoded(Image.fromarray(IDS), "TIFF", tiffinfo={262: 0}), "scaled or inverted"),
    (b"P5 4 1 20\n" + bytes([0, 1, 2, 20]), "scaled or inverted"),
    (b"P5 2 1 1000\n" + bytes([0, 1, 2, 20]), "scaled or inverted"),
    (encoded(Image.fromarray(COLORS), "PNG"), "got mode RGB; map its colors to ids"),
    (encoded(picture_of("RGBA"), "PNG"), "got mode RGBA"),
    (encoded(picture_of("LA"), "PNG"), "got mode LA"),
    (encoded(picture_of("F"), "TIFF"), "got mode F"),
    (png(np.array([[3, 256]]), 16), "ids go from 3 to 256: expected 0 to 255")])
def test_what_cannot_be_class_ids_is_refused_with_its_reason(data, said, tmp_path):
    (tmp_path / "m.bin").write_bytes(data)
    said = f"m.bin cannot be read as a mask: .*{said}"
    with pytest.raises(ValueError, match=said): read_mask(tmp_path / "m.bin")


# Upright

@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_and_masks_are_turned_as_pillow_turns_them(format, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(COLORS)
    plain, turned = encoded(picture, format), encoded(picture, format, exif=exif)
    (tmp_path / "plain").write_bytes(plain)
    (tmp_path / "turned").write_bytes(turned)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(turned))).convert("RGB"))
    found = read_image(tmp_path / "turned").permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)
    assert torch.equal(to_rgb(Image.open(tmp_path / "turned")), read_image(tmp_path / "turned"))
    assert (orientation > 1) == (not np.array_equal(found, read_image(tmp_path / "plain").permute(1, 2, 0)))
    if format in ("JPEG", "WEBP"): return
    ids = Image.fromarray(COLORS[..., 0])
    (tmp_path / "mask").write_bytes(encoded(ids, format, exif=exif))
    gray = Image.open(tmp_path / "mask")   # not decoded yet, and of a file that Pillow would map to memory
    assert torch.equal(to_rgb(gray)[0], read_mask(tmp_path / "mask"))
    assert np.array_equal(to_rgb(gray)[0], expected[..., 0])


def test_an_upright_mask_fits_an_image_that_lies_on_its_head(tmp_path):
    for name in ("images", "masks"): (tmp_path / name).mkdir()
    mask = (np.arange(48).reshape(8, 6) % 2).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    for orientation, stored in ((3, mask[::-1, ::-1]), (4, mask[::-1])):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored * 255).save(tmp_path / "images/a.png", exif=exif)
        image, ids = ImageMaskFolder(tmp_path / "images", tmp_path / "masks", 2)[0]
        assert torch.equal(image[0] > 127, ids > 0)
    exif[0x0112] = 6
    Image.fromarray(mask * 255).save(tmp_path / "images/a.png", exif=exif)
    with pytest.raises(ValueError, match="turned upright by their EXIF"):
        ImageMaskFolder(tmp_path / "images", tmp_path / "masks", 2)[0]


def test_a_damaged_exif_block_turns_nothing(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\2\3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(tmp_path / "x.jpg").shape == (3, 24, 32)


# Sizes, damage, names

@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (5000, 3), (3, 5000), (33, 17)])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "TGA", "JPEG"])
def test_images_and_masks_of_every_size(format, size, tmp_path):
    ids = Image.fromarray(rng.integers(0, 9, size[::-1], np.uint8))
    (tmp_path / "x").write_bytes(encoded(ids.convert("RGB") if format == "WEBP" else ids, format))
    image = read_image(tmp_path / "x")
    assert image.shape == (3, *size[::-1])
    if format in ("JPEG", "WEBP", "GIF"): assert read_or_refuse(read_mask, tmp_path / "x") is None
    else: assert np.array_equal(read_mask(tmp_path / "x"), ids) and np.array_equal(image[2], ids)


@pytest.mark.parametrize("format, how", [
    ("JPEG", dict(progressive=True)), ("TIFF", dict(compression="tiff_lzw")),
    ("TGA", dict(compression="tga_rle")),
    *((format, {}) for format in "PNG JPEG TIFF BMP GIF WEBP PPM JPEG2000 QOI ICO SGI PCX".split())])
def test_a_file_cut_anywhere_is_whole_or_refused(format, how, tmp_path):
    data, path = encoded(Image.fromarray(COLORS), format, **how), tmp_path / "x"
    path.write_bytes(data)
    whole = read_image(path)
    for place in (*np.linspace(0, len(data), 8, endpoint=False).astype(int), len(data) - 9, len(data) - 1):
        path.write_bytes(data[:place])
        found = read_or_refuse(read_image, path)
        assert found is None or np.array_equal(found, whole)


NAMES = [f"{stem}.png" for stem in (
    "with space", "Bäume", "Ba\u0308ume 2", "two\nlines", "quote'\"", "a.b.c", "%s{0}", "日本")]


def test_files_of_any_name_are_read_and_paired(tmp_path):
    for name in ("images", "masks"): (tmp_path / name).mkdir()
    for i, name in enumerate(NAMES):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "images" / name)
        Image.new("L", (4, 4), i).save(tmp_path / "masks" / name)
    data = ImageMaskFolder(tmp_path / "images", tmp_path / "masks", len(NAMES))
    assert len(data) == len(NAMES) and all(image[0].eq(mask).all() for image, mask in data)
    assert len(data.describe()["content"]) == 16
    broken = tmp_path / "images" / NAMES[3]
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match="two\nlines.png .the file is empty"): ImageFolder(broken.parent)


def test_names_that_are_no_text_are_read(tmp_path):
    try: Image.new("RGB", (4, 4)).save((path := tmp_path / b"\xff.png".decode("utf-8", "surrogateescape")))
    except OSError: pytest.skip("this file system takes no such name")
    assert ImageFolder(tmp_path)[0][0].shape == (3, 4, 4) and read_image(path).shape == (3, 4, 4)
    assert ImageFolder(tmp_path).describe()["content"]


@pytest.mark.parametrize("data, said", [
    (b"", "the file is empty"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer: run `git lfs pull`"),
    (b"<!DOCTYPE html>", "a web page or SVG"), (b"\x1f\x8bnothing", "its format is none that Pillow reads")])
def test_what_is_no_picture_is_called_what_it_is(data, said, tmp_path):
    (tmp_path / "x.png").write_bytes(data)
    for read in (read_image, read_mask, as_image, ImageFolder):
        path = tmp_path if read is ImageFolder else tmp_path / "x.png"
        with pytest.raises(ValueError, match=said): read(path)


def test_a_scan_larger_than_pillow_reads_is_called_that(tmp_path, monkeypatch):
    Image.new("L", (40, 50)).save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    said = "2000 pixels. exceeds limit.*Cut it into tiles, or, if you trust it, set `PIL.Image.MAX_IMAGE"
    for read in (read_image, read_mask, as_image):
        with pytest.raises(ValueError, match=f"scan.png cannot be .*{said}"): read(tmp_path / "scan.png")
    with pytest.raises(ValueError, match=f"no images: scan.png .*{said}"): ImageFolder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert ImageFolder(tmp_path)[0][0].shape == (3, 50, 40)
