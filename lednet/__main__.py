"""`python -m lednet COMMAND`, for torchrun: `torchrun --nproc-per-node=2 -m lednet train`."""

from lednet.cli.main import main

if __name__ == "__main__":
    main()
