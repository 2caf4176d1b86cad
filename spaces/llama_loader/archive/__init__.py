"""What archives are made of: compression, tar members, other people's archives."""
