"""What the command line and the scripts of a clone share: options, tables, and the paper's comparison as a program."""
