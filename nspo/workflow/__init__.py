"""What the workflow's rules are made of: settings read, inputs named, parameters and resources of every job."""
