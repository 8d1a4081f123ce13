"""`deepspeed --module orpo_ds train …` and `python -m orpo_ds …`: the same commands as `orpo-ds`."""

from orpo_ds.cli import main

if __name__ == "__main__":
    main()
