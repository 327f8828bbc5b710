"""Images in folders, zips and tars: the right bytes, from any thread or process, and no way out."""

from __future__ import annotations

import io
import pickle
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saisa_jax.config import VisionConfig
from saisa_jax.data.images import load_image, read_image
from saisa_jax.data.sample import DataError, StoredImage
from saisa_jax.data.sources.archives import open_images
from saisa_jax.data.views import ImageLoader


def _png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


FILES = {f"a/{i}.png": _png(i) for i in range(20)} | {"b/é 日.png": _png(50), "text.txt": b"abc" * 1000}


def _folder(root: Path) -> Path:
    for name, data in FILES.items():
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).write_bytes(data)
    return root / "images"


def _zip(path: Path, method: int = zipfile.ZIP_DEFLATED, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("a")
        for name, data in FILES.items():
            archive.writestr(prefix + name, data)
    return path


def _tar(path: Path, mode: str = "w", prefix: str = "") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in FILES.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(params=["folder", "zip", "zip stored", "tar", "tar ./"])
def place(request, tmp_path) -> Path:
    match request.param:
        case "folder":
            return _folder(tmp_path)
        case "zip":
            return _zip(tmp_path / "a.zip")
        case "zip stored":
            return _zip(tmp_path / "a.ZIP", zipfile.ZIP_STORED)
        case "tar":
            return _tar(tmp_path / "a.tar")
    return _tar(tmp_path / "a.tar", prefix="./")


def test_every_file_is_found_and_read(place) -> None:
    images = open_images(place)
    for store in (images, pickle.loads(pickle.dumps(images))):
        for name, data in FILES.items():
            assert read_image(store.find(name, "s")) == data
            assert read_image(store.find(f"./{name}", "s")) == data
    assert np.asarray(load_image(images.find("a/7.png", "s")))[0, 0].tolist() == [7, 0, 0]
    load = ImageLoader(VisionConfig(image_size=4, patch_size=1, image_mode="resize"))
    assert load(images.find("a/7.png", "s")) is load(images.find("a/7.png", "s"))  # kept by its place


def test_threads_share_it(place) -> None:
    images = pickle.loads(pickle.dumps(open_images(place)))
    wrong: list[str] = []

    def read(names: list[str]) -> None:
        wrong.extend(name for name in names * 5 if read_image(images.find(name, "s")) != FILES[name])

    threads = [threading.Thread(target=read, args=(list(FILES)[n:] + list(FILES)[:n],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "name",
    ["../x.png", "a/../../x.png", "/etc/passwd", "C:/x.png", "c:x.png", "a\\0.png", "..\\x.png", "", "/", ".", "a\0b"],
)
def test_a_name_that_leads_out_is_refused(place, name) -> None:
    with pytest.raises(DataError, match=r"sample 's/1': image '.*' is not a path within sources.images"):
        open_images(place).find(name, "s/1")


def test_an_absolute_name_says_which_flag_takes_it(place) -> None:
    with pytest.raises(DataError, match=r"sources.allow_absolute=True takes absolute names"):
        open_images(place).find("/data/x.png", "s/1")


def test_links_lead_where_their_maker_wants(tmp_path) -> None:
    root = _folder(tmp_path)
    (tmp_path / "elsewhere" / "coco").mkdir(parents=True)
    (tmp_path / "elsewhere" / "coco" / "x.png").write_bytes(_png(1))
    (root / "out.png").symlink_to(tmp_path / "elsewhere" / "coco" / "x.png")
    (root / "coco").symlink_to(tmp_path / "elsewhere" / "coco")  # how people lay out LLaVA's data
    (tmp_path / "link").symlink_to(root)
    for images in (open_images(root), open_images(tmp_path / "link")):
        assert read_image(images.find("a/3.png", "s")) == FILES["a/3.png"]
        for name in ("out.png", "coco/x.png"):
            assert read_image(images.find(name, "s")) == _png(1)


def test_what_is_not_there(place, tmp_path) -> None:
    images = open_images(place)
    with pytest.raises(DataError, match=r"sample 's/1': there is no image .*a/99\.png"):
        load_image(images.find("a/99.png", "s/1"), "s/1")
    if place.is_file():
        with pytest.raises(DataError, match=r"\(it holds, say, '(\./)?a/0\.png'\)"):
            images.find("0.png", "s/1")
    with pytest.raises(DataError, match=r"there is no image .*a/0\.jpg.*'(a/)?0\.png' is there"):
        load_image(images.find("a/0.jpg", "s/1"), "s/1")
    with pytest.raises(DataError, match=r"sources.images='.*none' is neither a folder nor a .zip or .tar file here"):
        open_images(tmp_path / "none")


def test_links_and_folders_in_a_tar_are_no_files(tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("empty.png"))
    images = open_images(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"there is no image 'link.png'"):
        images.find("link.png", "s")
    with pytest.raises(DataError, match=r"sample 's': cannot read image of 0 bytes"):
        load_image(read_image(images.find("empty.png", "s")), "s")


def test_of_two_members_of_one_name_the_last_holds(tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("x", b"old"), ("y", b"other"), ("./x", b"new")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert read_image(open_images(tmp_path / "a.tar").find("x", "s")) == b"new"


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.zip", lambda path: path.write_bytes(_zip(path).read_bytes()[:-30]), "cannot be read"),
        ("a.zip", lambda path: path.write_bytes(b""), "cannot be read"),
        ("a.zip", lambda path: zipfile.ZipFile(path, "w").close(), "holds no files"),
        ("a.zip", lambda path: _zip(path, zipfile.ZIP_LZMA), "is encrypted, or packed otherwise"),
        ("a.tar", lambda path: path.write_bytes(_tar(path).read_bytes()[:20_000]), "cannot be read"),
        ("a.tar", lambda path: path.write_bytes(b"no tar at all" * 100), "cannot be read.*unpack it"),
        ("a.tar", lambda path: _tar(path, "w:gz"), "cannot be read.*if it is compressed, unpack it"),
        ("a.tar.gz", lambda path: _tar(path, "w:gz"), "neither a folder nor a .zip or .tar; unpack it first"),
    ],
)
def test_an_archive_that_cannot_be_used(tmp_path, name, make, message) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=rf"sources.images.*{message}"):
        open_images(tmp_path / name)


def test_damage_within_a_zip_is_found_when_it_is_read(tmp_path) -> None:
    path = _zip(tmp_path / "a.zip")
    whole = bytearray(path.read_bytes())
    images = open_images(path)
    found = 0
    for place in range(60, len(whole) // 2, 97):
        path.write_bytes(bytes(whole[:place]) + bytes([whole[place] ^ 0xFF]) + bytes(whole[place + 1 :]))
        for name, data in FILES.items():
            try:
                assert read_image(images.find(name, "s"), "s") == data
            except DataError as error:
                assert str(error).startswith("sample 's': cannot read")
                found += 1
    assert found > 5
    path.write_bytes(bytes(whole[: len(whole) // 2]))
    with pytest.raises(DataError, match=r"within a member: it is cut or has changed"):
        read_image(open_images_unscanned(images, path).find("text.txt", "s"), "s")


def open_images_unscanned(images, path):
    """The same archive in another process, where the file has changed meanwhile."""
    assert isinstance(images.find("text.txt", "s"), StoredImage)
    assert images.path == str(path)
    return pickle.loads(pickle.dumps(images))


def test_a_member_that_lies_about_its_size_is_not_unpacked(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(50_000_000))
    data = (tmp_path / "a.zip").read_bytes()
    size = (50_000_000).to_bytes(4, "little")
    assert data.count(size) == 2
    (tmp_path / "b.zip").write_bytes(data.replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"damaged: its checksum does not match"):
        read_image(open_images(tmp_path / "b.zip").find("bomb.png", "s"))
    (tmp_path / "c.zip").write_bytes(data.replace(size, (2**31).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"says that it has 2,147,483,648 bytes"):
        read_image(open_images(tmp_path / "c.zip").find("bomb.png", "s"))


def test_pickled_it_is_small(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(1000):
            archive.writestr(f"a_long_name_of_a_folder/{i:050d}.png", b"")
    assert len(pickle.dumps(open_images(tmp_path / "a.zip"))) < 1000 * 56
