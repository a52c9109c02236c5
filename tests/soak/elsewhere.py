"""A door of nobody: takes connections and ends them, so that strangers can be as busy as at the daemon's and cost it
nothing. Prints its port and goes on until it is ended."""

import socket

from strangers import give_way

HOST = "127.0.0.1"
BACKLOG = 4096


def main() -> None:
    give_way()
    with socket.create_server((HOST, 0), backlog=BACKLOG) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            listening.accept()[0].close()


if __name__ == "__main__":
    main()
