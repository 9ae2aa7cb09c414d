"""Runs `zimage run …` in forked children of one process that has imported everything, so that a run starts in a second.

Its argument is the JSON list of words of a short run, which it makes itself: what that has imported, no child has to.
Reads JSON lists of words from standard input, one a line; answers each with the child's process id, then with its exit
code (negative: the signal that killed it).
"""

import json
import os
import sys

from zimage_lit import cli


def main() -> None:
    if cli.main(["run", *json.loads(sys.argv[1])]):
        sys.exit("the first run has failed")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = cli.main(["run", *json.loads(line)])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(child, file=sys.__stdout__, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
