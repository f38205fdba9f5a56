// Go's own TLS, over HTTP/1.1 and HTTP/2-capable transports: twenty connections, each kept alive for three requests.
package main

import (
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
	fmt.Println("done")
}
