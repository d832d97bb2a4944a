"""Triton kernels, one file per operation, with the raw functions of docs/contracts.md.

Installed as ``frskd_fast.kernels``. Importing this package loads nothing; its modules import Triton.
"""

if __name__ == "kernels":
    raise ImportError(
        "The folder 'kernels' was imported as a top-level package, but it is a part of frskd_fast; "
        "write 'from frskd_fast.kernels import ...' (PyPI's 'kernels' is another project: to use it, do not start "
        "Python in the source folder of frskd_fast)."
    )
