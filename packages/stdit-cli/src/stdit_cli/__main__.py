"""Run the command line as `python -m stdit_cli`; torchrun and `stdit train --nproc` start it this way."""

from stdit_cli.main import main

main()
