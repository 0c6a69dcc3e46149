"""From files to files: inputs checked, runs begun, resumed and recorded."""
