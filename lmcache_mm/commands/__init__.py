"""What `lmcache-mm COMMAND` runs."""
