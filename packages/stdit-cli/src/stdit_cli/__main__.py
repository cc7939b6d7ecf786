"""`python -m stdit_cli`, which is how torchrun starts it: torchrun -m stdit_cli train ..."""

from stdit_cli.main import main

if __name__ == "__main__":  # the processes of `stdit train --nproc` import this file too
    main()
