"""Pictures in, batches out: `sources` and `beton` write FFCV files, `loaders` reads them.

ffcv, numba and OpenCV are imported only where they are used, so that a machine without them can read
ImageFolder trees.
"""
