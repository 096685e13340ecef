"""`vitpa export RUN`: a finished run's weights for others, with what it takes to use them and to believe them."""
