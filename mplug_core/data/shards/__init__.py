"""Data at scale: any data set packed into tar shards, and shards streamed into training from disk, HTTP or S3.

A *pack* is a folder: tars in the webdataset convention (``000000007.jpg`` beside ``000000007.json``), beside each tar
the places of its samples (``.idx``) and its texts (``.jsonl.gz``), and ``index.json``, written last.

- ``index``: what ``index.json`` says, checked; ``samples``: a sample's bytes to images and records, and back
- ``inputs``: what can be packed; ``download``: images behind URLs; ``pack``: the writing
- ``remote``: files of a pack, in place or fetched into a bounded cache; ``reading``: samples of a shard by their place
- ``order``: which samples make a batch, by arithmetic alone; ``source``: batches for training
- ``summary``: what a pack holds, for people

Nothing in a shard is executed or unpickled, no name in it becomes a path, and no URL is opened but http, https and s3.
"""
