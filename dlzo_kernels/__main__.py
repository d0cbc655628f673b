"""`python -m dlzo_kernels`: what was built and what runs here."""

from dlzo_kernels.backends import report

if __name__ == "__main__":
    print(report())
