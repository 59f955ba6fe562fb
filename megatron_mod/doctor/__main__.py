"""``python -m megatron_mod.doctor``, also where what reads command lines is missing."""

import sys


def main() -> None:
    try:
        from megatron_mod.commands.doctor import main as with_options
    except ImportError as error:
        from megatron_mod.doctor.diagnosis import diagnose
        from megatron_mod.doctor.page import page

        if len(sys.argv) > 1:
            print(f"Options cannot be read here: {error}.", file=sys.stderr)
        found = diagnose()
        print(page(found))
        sys.exit(int(not found["can_train"]))
    with_options()


if __name__ == "__main__":
    main()
