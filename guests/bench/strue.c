/* The smallest program, for proc.exec. */
int main(void)
{
	return 0;
}
