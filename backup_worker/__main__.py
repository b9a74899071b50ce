"""`python -m backup_worker` is `backup-worker`."""

from backup_worker.cli import main

if __name__ == "__main__":
    main()
