"""Units on disk and in batches.

shards (the format) <- journal (work that can be interrupted) <- extract (folders of recordings -> shards); loader (shards ->
batches); foreign (slamkit's and fairseq's unit files), inspector (a folder in numbers). `python -m corpus` imports, exports and
inspects.
"""
