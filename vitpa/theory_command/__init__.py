"""`vitpa theory`: the experiments of vitpa.theory as commands, with files, tables and figures."""
