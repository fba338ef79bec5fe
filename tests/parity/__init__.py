"""Every sampling and output feature, served in every way, against one engine that does it all: the same answers.

`features` are the rows, `single` is what is right, `ways` are the columns, `table` compares. As a program
(``python -m tests.parity docs/parity.md``) it writes the table.
"""
