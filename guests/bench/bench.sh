# app.shell, for busybox: arithmetic, expansion of strings, pipes and processes.
n=$1
i=0
s=0
while [ $i -lt $n ]; do
	j=0
	while [ $j -lt 50 ]; do
		s=$(((s * 31 + j) % 65521))
		x=${s%?}abc
		j=$((j + 1))
	done
	y=$(echo "$x $s" | /bin/busybox sed 's/a/b/g' | /bin/busybox wc -c)
	s=$((s + y))
	i=$((i + 1))
done
echo $s
