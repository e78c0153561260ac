"""Short names of released models: where each comes from, and what is known about it.

None of these addresses was checked when this table was written: AliceMind's files were served from that bucket, and
ModelScope has the task models under these ids. No checksum of any of them is known. Parameters are those that take
part, counted in the released code's models; bytes are what those models take in fp32 when they are saved without
momentum twins, so a file may be larger (twins) or smaller (half precision).
"""

from __future__ import annotations

from dataclasses import dataclass

ALICEMIND = "http://alice-open.oss-cn-zhangjiakou.aliyuncs.com/mPLUG"
LICENCE = "see the source (the authors' code is Apache-2.0)"


@dataclass(frozen=True)
class Released:
    """A released model. ``sources`` are tried in their order; what is None is not known."""

    name: str
    task: str
    sources: tuple[str, ...]
    parameters: int | None = None
    about_bytes: int | None = None
    image_size: int | None = None
    """Pixels: what the paper trains this size and task at; the file itself decides."""
    licence: str = LICENCE


RELEASED = {
    released.name: released
    for released in (
        Released(
            "mplug-base",
            "pre-trained",
            (f"{ALICEMIND}/mplug_base.pth", "ms:damo/mplug_backbone_base_en"),
            parameters=344_700_000,
            about_bytes=2_000_000_000,
            image_size=256,
        ),
        Released(
            "mplug-large",
            "pre-trained",
            (f"{ALICEMIND}/mplug_large.pth",),
            parameters=565_300_000,
            about_bytes=3_100_000_000,
            image_size=224,
        ),
        Released("mplug-large-v2", "pre-trained", (f"{ALICEMIND}/mplug_large_v2.pth",)),
        Released(
            "mplug-base-caption-coco",
            "caption",
            ("ms:damo/mplug_image-captioning_coco_base_en",),
            parameters=224_000_000,
            about_bytes=2_000_000_000,
            image_size=384,
        ),
        Released(
            "mplug-large-vqa",
            "vqa",
            ("ms:damo/mplug_visual-question-answering_coco_large_en",),
            parameters=565_300_000,
            about_bytes=3_100_000_000,
            image_size=336,
        ),
        Released(
            "mplug-large-retrieval-flickr30k",
            "retrieval",
            ("ms:damo/mplug_image-text-retrieval_flickr30k_large_en",),
            parameters=427_800_000,
            about_bytes=2_500_000_000,
            image_size=336,
        ),
    )
}
