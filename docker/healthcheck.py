"""Health of the daemon in this container: asks /livez of the admin port, whichever role it is. Stdlib only, no pdkv."""

import os
import sys
import urllib.error
import urllib.request

ADMIN_PORTS = (8090, 8190, 8290)
"""Where router, prefill and decode worker have their admin port unless told otherwise."""


def check(address: str) -> int | None:
    """The status of ``/livez``; None when nobody answers there."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through an inherited proxy
    try:
        with opener.open(f"http://{address}/livez", timeout=3) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        exc.close()
        return exc.code
    except OSError:
        return None


def main() -> int:
    """0 when one daemon answers and is live, else 1."""
    told = os.environ.get("PDKV_ADMIN_LISTEN", "")
    addresses = [f"127.0.0.1:{told.rpartition(':')[2]}"] if told else [f"127.0.0.1:{port}" for port in ADMIN_PORTS]
    return 0 if 200 in [check(address) for address in addresses] else 1


if __name__ == "__main__":
    sys.exit(main())
