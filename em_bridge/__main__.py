"""`python -m em_bridge` is `em-bridge`."""

from em_bridge.cli import main

if __name__ == "__main__":
    main()
