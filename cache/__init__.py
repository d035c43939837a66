"""The HDF5 feature cache: format, writer, reader and few-shot sampling (NumPy and h5py only)."""
