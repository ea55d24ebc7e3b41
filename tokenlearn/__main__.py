"""``python -m tokenlearn``."""

from tokenlearn.main import main

if __name__ == "__main__":
    main()
