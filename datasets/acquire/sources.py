"""Where the datasets come from: addresses, checksums, approximate sizes, and what to do by hand.

All of this was collected from public code and issue reports; no address has been tried. Checksums of the originals are
torchvision's or the authors'; those of re-packed copies were reported by users of these copies.
"""

from dataclasses import dataclass

# CoOp's split files in a public repository (MIT), and the images in CoOp's layout as one zip per dataset, pinned.
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/main/splits"
MIRROR = "https://huggingface.co/zhengli97/prompt_learning_dataset/resolve/ceb3112337fb6e1bf71534e355ca5569b63f19a6"
HUB = "https://huggingface.co"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
BERKELEY = "https://people.eecs.berkeley.edu/~hendrycks"


@dataclass(frozen=True)
class Archive:
    """A file with a dataset's images. `url` is an address, or `drive:` and a Google Drive id.

    `checksum` is its MD5 (32 digits) or SHA-256 (64), None if unknown; `saved_as` its name here, if not the address's.
    """

    url: str
    checksum: str | None = None
    saved_as: str = ""

    @property
    def file(self) -> str:
        return self.saved_as or self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """How to get one dataset.

    `archives` have the same images and are tried in order. They have about `gigabytes` (10^9 bytes), and so have their
    unpacked images. `split_drive` and `split_sha256` are the Google Drive id and the checksum of CoOp's split file, if
    there is one; `split_reported` means that the checksum is not that of the copy below SPLITS but was reported for
    another. `parts` are the folders that must be in the image folder (empty: only the image folder itself). `called` is
    another name of the image folder in the archive. `hints` say where else to look if the addresses fail.
    """

    archives: tuple[Archive, ...]
    gigabytes: float
    split_drive: str = ""
    split_sha256: str = ""
    split_reported: bool = False
    parts: tuple[str, ...] = ()
    called: str = ""
    hints: tuple[str, ...] = ()


def _copy(file: str, sha256: str | None = None) -> Archive:
    # Under another name: some differ from the original's only in upper and lower case, and a partial download of one
    # must not be resumed with the other.
    return Archive(f"{MIRROR}/{file}", sha256, saved_as=file.replace(".zip", "-copy.zip"))


SOURCES = {
    "imagenet": Source(
        archives=(),
        gigabytes=145,
        parts=("train", "val"),
        hints=(
            "register at https://image-net.org/download.php, accept the terms and get the ILSVRC2012 files:",
            "ILSVRC2012_img_train.tar (about 138 GB, MD5 1d675b47d978889d74fa0da5fadfb00e)",
            "ILSVRC2012_img_val.tar (about 6.3 GB, MD5 29b22e2961454d5413ddabcf34fc5622)",
            "ILSVRC2012_devkit_t12.tar.gz (2.5 MB, MD5 fa75699e90414af021442c21a62c3abf), which sorts the second",
            "folders unpacked earlier are fine too: train/ with one folder per class, val/ sorted or flat",
        ),
    ),
    "sun397": Source(
        archives=(
            Archive(  # the checksum is that of the original, whose host no longer answers
                f"{HUB}/zhengli97/SUN397_Dataset/resolve/main/SUN397.tar.gz", "8ca2778205c41d23104230ba66911c7a"
            ),
            _copy("sun397.zip", "ce6dee6685c9f1d592c8297e193dde885aa9c50d008fd998a38ccc57a3dda722"),
        ),
        gigabytes=39,
        split_drive="1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq",
        split_sha256="9847f9ef611008073ac42adee6614bbb83f877cfbcfbd3115fc8284e0c8c1c47",
        split_reported=True,
        hints=(
            "the original host (vision.princeton.edu) has answered 404 since about September 2025;",
            "mirrors: OpenDataLab/SUN397 (raw files), Kaggle lash45/sun397-50-50 (needs an account);",
            "Hugging Face 1aurent/SUN397 and tanganke/sun397 are parquet files that may have lost the original names",
        ),
    ),
    "fgvc": Source(
        archives=(
            Archive(f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", "d4acdd33327262359767eeaa97a4f732"),
            _copy("fgvc_aircraft.zip"),
        ),
        gigabytes=2.8,
    ),
    "eurosat": Source(
        archives=(
            Archive(
                f"{HUB}/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                "c8fa014336c82ac7804f0398fcb19387",
            ),
            _copy("eurosat.zip"),
        ),
        gigabytes=0.1,
        split_drive="1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
        split_sha256="541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2",
        called="EuroSAT_RGB",
        hints=("also at https://zenodo.org/records/7711810 (EuroSAT_RGB.zip)",),
    ),
    "stanford_cars": Source(
        archives=(_copy("stanford_cars.zip", "50812812f33534ef2906b992762f96e8a5bb57b0eedc53800e91b7ed599abf8e"),),
        gigabytes=2,
        split_drive="1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT",
        split_sha256="40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d",
        parts=("cars_train", "cars_test"),
        hints=(
            "the original host (ai.stanford.edu) has not answered since April 2023;",
            "mirrors: Kaggle jessicali9530/stanford-cars-dataset (needs an account),",
            "Google Drive https://drive.google.com/file/d/150nwNkg7qXh28yabiqNAOfBMMll7ALlu,",
            "or the original cars_train.tgz (MD5 065e5b463ae28d29e77c1b4b166cfe61) and cars_test.tgz"
            " (MD5 4ce7ebf6a94d07f1952d94dd34c4d501) from anyone who kept them;",
            "the split needs cars_train/00001.jpg to 08144.jpg and cars_test/00001.jpg to 08041.jpg:"
            " copies with renamed or sorted images do not work",
        ),
    ),
    "food101": Source(
        archives=(
            Archive("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87"),
            _copy("food101.zip"),
        ),
        gigabytes=5,
        split_drive="1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl",
        split_sha256="7c3d456c4f348255e1a363e0ea5118318936488f3ec20d83758e0ee67cb9037c",
        split_reported=True,
    ),
    "oxford_pets": Source(
        archives=(
            Archive(f"{OXFORD}/pets/data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
            _copy("oxford_pets.zip"),
        ),
        gigabytes=0.8,
        split_drive="1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs",
        split_sha256="d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e",
    ),
    "oxford_flowers": Source(
        archives=(
            Archive(f"{OXFORD}/flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
            _copy("oxford_flowers.zip"),
        ),
        gigabytes=0.4,
        split_drive="1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
        split_sha256="2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794",
    ),
    "caltech101": Source(
        archives=(
            Archive(  # holds 101_ObjectCategories.tar.gz
                "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip", "3138e1922a9193bfa496528edbbc45d0"
            ),
            _copy("caltech-101.zip"),
        ),
        gigabytes=0.3,
        split_drive="1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
        split_sha256="52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5",
    ),
    "dtd": Source(
        archives=(
            Archive(f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1"),
            _copy("dtd.zip", "5ba4d3000e60f5541ba15a082033ca0696eee68125e9c28edff3dbe22f04313b"),
        ),
        gigabytes=0.7,
        split_drive="1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
        split_sha256="f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38",
    ),
    "ucf101": Source(
        archives=(
            _copy("ucf101.zip", "2fe1bd40e64408d02ff173badf744da557033ae6c75dd4ea51519366551f3ae6"),
            Archive("drive:10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O", saved_as="UCF-101-midframes.zip"),
        ),
        gigabytes=0.2,
        split_drive="1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y",
        split_sha256="d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8",
        hints=("frames that you extract from the videos are other images: their results cannot be compared",),
    ),
    "imagenet_v2": Source(
        archives=(
            Archive(f"{HUB}/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz"),
            _copy("imagenetv2.zip"),
        ),
        gigabytes=1.3,
    ),
    "imagenet_sketch": Source(
        archives=(
            Archive(f"{HUB}/datasets/songweig/imagenet_sketch/resolve/main/data/ImageNet-Sketch.zip"),
            Archive("drive:1Mj0i5HBthqH1p_yeXzsg22gZduvgoNeA", saved_as="ImageNet-Sketch.zip"),
            _copy("imagenet-sketch.zip"),
        ),
        gigabytes=7.5,
        called="sketch",
    ),
    "imagenet_a": Source(
        archives=(
            Archive(f"{BERKELEY}/imagenet-a.tar", "c3e55429088dc681f30d81f4726b6595"),
            _copy("imagenet-adversarial.zip"),
        ),
        gigabytes=0.7,
    ),
    "imagenet_r": Source(
        archives=(
            Archive(f"{BERKELEY}/imagenet-r.tar", "a61312130a589d0ca1a8fca1f2bd3337"),
            _copy("imagenet-rendition.zip"),
        ),
        gigabytes=2.2,
    ),
}
