"""Files that others wrote, opened safely: weights, their names, where to get them.

pickles (read, never executed), archive (zips), download (known names -> files) -> files (a path or name -> tensors; what this
project writes) -> families (tables: their names, our names) -> pretrained (reads the tables both ways).
"""
