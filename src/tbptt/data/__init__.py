"""The recordings that ship with the package; README.md beside this file names their licences."""
