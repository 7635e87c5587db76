"""`python -m softprompt.cli`."""

from softprompt.cli import main

if __name__ == "__main__":
    main()
