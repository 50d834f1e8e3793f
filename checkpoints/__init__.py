"""Files that others wrote, opened safely: weights, their names, where to get them.

pickles (read, never executed), archive (zips), known (names and addresses) -> download (a known name -> files) -> files (a path
or name -> tensors; what this project writes) -> families (tables: their names, our names) -> pretrained (reads them both ways).
"""
