// Go's own TLS, over HTTP/1.1 and HTTP/2-capable transports: twenty connections, each kept alive for
// three requests, and one that is read once more after it was closed, as net/http may do.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	pool := x509.NewCertPool()
	pem, _ := os.ReadFile(os.Getenv("CA"))
	pool.AppendCertsFromPEM(pem)
	host, port := os.Getenv("HOST"), os.Getenv("PORT")
	// The program is found by its structure when it starts: wait until it was.
	fmt.Println("up")
	fmt.Scanln()
	for turn := 0; turn < 20; turn++ {
		transport := &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool},
			Dial:            func(_, _ string) (net.Conn, error) { return net.DialTimeout("tcp", "127.0.0.1:"+port, time.Second) },
		}
		client := &http.Client{Transport: transport}
		for _, size := range []int{10, 5000, 100000} {
			url := fmt.Sprintf("https://%s:%s/bytes/%d", host, port, size)
			response, err := client.Post(url, "text/plain", bytes.NewReader(bytes.Repeat([]byte("g"), size)))
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			body, _ := io.ReadAll(response.Body)
			response.Body.Close()
			if len(body) != size {
				os.Exit(2)
			}
		}
		transport.CloseIdleConnections()
	}
	connection, err := tls.Dial("tcp", "127.0.0.1:"+port, &tls.Config{RootCAs: pool, ServerName: host})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Fprintf(connection, "POST /bytes/10 HTTP/1.1\r\nHost: %s:%s\r\nContent-Length: 1\r\n\r\ng", host, port)
	response, err := http.ReadResponse(bufio.NewReader(connection), nil)
	if err != nil {
		os.Exit(3)
	}
	io.ReadAll(response.Body)
	connection.Close()
	if _, err := connection.Read(make([]byte, 1)); err == nil {
		os.Exit(4)
	}
	fmt.Println("done")
}
