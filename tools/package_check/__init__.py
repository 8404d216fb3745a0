"""`python -m tools.package_check dist/*.whl dist/*.tar.gz`: the two files of a release, where somebody installs them.

Makes an environment of torch alone, installs the wheel there and runs the README's first program, with no compiler in
reach, and the training program without and with what that needs. Then it unpacks the source archive, sees that every
file of the checkout is in it, builds a wheel from it, installs that and runs some of the archive's tests.
`make package-check` runs the checkers of others before: metadata.sh, files.sh.

Exit status: 0 if all passed, 1 if not.
"""
