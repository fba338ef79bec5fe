"""`tandem demo`: a small cluster serves fixed `traffic`, and a `report` says whether it kept its promises."""
