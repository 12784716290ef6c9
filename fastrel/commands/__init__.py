"""What the commands of the `fastrel` program do, one file each."""
