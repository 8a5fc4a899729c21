"""`agent-runtime torture`: kills a real server again and again, and compares what it acknowledged with what it kept.

state     what a session must be like        calls     every call that changes one
tracked   what is known of one, and what may be
compare   what one is like, and in what it differs
wire      a connection to the server         process   the server, to be killed
plan      what happens in which cycle        drive     what the connections do
books     figures and findings               run       the cycles
report    what is said at the end            command   the command line
"""

from __future__ import annotations
